"""Evaluation: attacks, a defended classifier and a data set go in, records come out."""

from purify.evaluate.finish import Finished, finish, open_run, run_config
from purify.evaluate.metrics import Estimate, summarize
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, evaluate, results

__all__ = [
    "Defence",
    "Estimate",
    "Finished",
    "RunFolder",
    "Samples",
    "evaluate",
    "finish",
    "open_run",
    "results",
    "run_config",
    "summarize",
]
