from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from leakaudit.numerics import faithful, least_squares


def settings() -> dict[str, object]:
    return {
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.get_float32_matmul_precision(),
        "cudnn": torch.backends.cudnn.enabled,
        "deterministic convolutions": torch.backends.cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "only a warning": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
    }


@pytest.fixture
def medium_products() -> Iterator[None]:
    """As of a user who trains with less: what an audit must neither use nor change."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_on_cuda_float32_is_exact_and_deterministic_and_everything_is_put_back(medium_products, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, inside = settings(), {}

    def fail() -> None:
        with faithful(torch.device("cuda")):
            inside.update(settings())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == {
        "tf32 in convolutions": False,
        "products": "highest",
        "cudnn": True,
        "deterministic convolutions": True,
        "deterministic": True,
        "only a warning": True,
        "filled": False,
    }
    assert settings() == before
    assert before["products"] == "medium"


def test_nothing_changes_on_a_cpu(medium_products):
    before = settings()
    with faithful(torch.device("cpu")):
        assert settings() == before


@pytest.mark.gpu
def test_a_convolution_on_a_gpu_agrees_with_float64():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 64, 32, 32, generator=generator, device="cuda")
    weight = torch.randn(64, 64, 3, 3, generator=generator, device="cuda")
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    with faithful(x.device):
        found = torch.nn.functional.conv2d(x, weight)
    assert ((found - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("driver", ["gelsy", "gelsd"])
def test_least_squares_of_deficient_rank_gives_the_shortest_solution(driver):
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    a = torch.cat([thin, thin.sum(dim=1, keepdim=True)], dim=1)
    b = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(least_squares(a, b, driver), torch.linalg.pinv(a, rtol=1e-12) @ b)
