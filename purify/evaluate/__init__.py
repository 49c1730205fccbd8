"""Evaluation: attacks, a defended classifier and a data set go in, records come out."""

from purify.evaluate.metrics import Estimate, summarize
from purify.evaluate.records import RunFolder
from purify.evaluate.runner import Defence, Samples, evaluate, results

__all__ = ["Defence", "Estimate", "RunFolder", "Samples", "evaluate", "results", "summarize"]
