"""What a dictionary is worth and what it learned: metrics, top examples, the report."""

from fastsae.evaluate.examples import Example, LatentExamples, top_examples
from fastsae.evaluate.metrics import Evaluation, evaluate
from fastsae.evaluate.report import write_report

__all__ = ["Evaluation", "Example", "LatentExamples", "evaluate", "top_examples", "write_report"]
