const rows = [...document.querySelectorAll("#all tbody tr")];
const table = document.querySelector("#all tbody");
const filters = document.querySelector(".filters");
const search = document.getElementById("search");
const choices = [...document.querySelectorAll("select[data-filter]")];
const words = new Map(rows.map((row) => [row, (row.dataset.cell + " " + row.textContent).toLowerCase()]));
const folds = new Map([...document.querySelectorAll("details[data-for]")].map((fold) => [fold.dataset.for, fold]));

function matches(row) {
  const wanted = search.value.toLowerCase().split(/\s+/);
  return wanted.every((word) => words.get(row).includes(word))
    && choices.every((choice) => !choice.value || row.dataset[choice.dataset.filter] === choice.value);
}
function filter() {
  let shown = 0;
  for (const row of rows) {
    row.hidden = !matches(row);
    folds.get(row.dataset.index).hidden = row.hidden;
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length} cells`;
}
function sortBy(place, heading) {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  const value = (row) => row.cells[place].dataset.sort ?? row.cells[place].textContent.trim();
  const numeric = rows.some((row) => row.cells[place].dataset.sort !== undefined);
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (!numeric) return x.localeCompare(y, undefined, { numeric: true });
    if (x === "" || y === "") return 0;
    return Number(x) - Number(y);
  };
  const known = rows.filter((row) => !numeric || value(row) !== "");
  const unknown = rows.filter((row) => numeric && value(row) === "");
  known.sort((a, b) => (ascending ? compare(a, b) : compare(b, a)));
  table.append(...known, ...unknown);
  for (const other of document.querySelectorAll("#all th[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}
function open() {
  const found = location.hash.startsWith("#cell-") && document.getElementById(location.hash.slice(1));
  const fold = found && found.closest("details");
  if (!fold) return;
  fold.hidden = false;
  fold.open = true;
  requestAnimationFrame(() => fold.scrollIntoView({ behavior: "instant" }));
}
if (rows.length) {
  filters.hidden = false;
  search.addEventListener("input", filter);
  for (const choice of choices) choice.addEventListener("change", filter);
  filter();
  document.querySelectorAll("#all thead th").forEach((heading, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sortBy(place, heading));
  });
}
addEventListener("hashchange", open);
addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#cell-"]');
  if (link && link.getAttribute("href") === location.hash) open();
});
open();
