"""The process of one contender; see :mod:`fxquant.bench.worker`."""

from .worker import main

main()
