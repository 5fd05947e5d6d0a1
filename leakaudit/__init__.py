"""leakaudit: what do the updates of federated learning give away?"""

__version__ = "0.1.0"
