"""The process of one contender; see :mod:`fxquant.bench.step.worker`."""

from .worker import main

main()
