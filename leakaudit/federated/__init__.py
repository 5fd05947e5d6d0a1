"""The systems around the leak: training across clients, on a virtual clock, and what each party sees of it.

    options.py      every system's options; imports no torch
    population.py   clients: their share of the data and their device
    cost.py         seconds and bytes: the cost model
    task.py         the model, the data of every client, the held-out data
    trainer.py      local training, put off and done for many clients at once
    simulation.py   the clock, the network, the curve; a system runs in it
    seen.py         what each party sees

A system is one file with `run(options, simulation)`, a SimPy process.
"""
