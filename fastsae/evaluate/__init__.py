"""What a dictionary is worth and what it learned: metrics, top examples, the report."""

from fastsae.evaluate.examples import Example, LatentExamples, top_examples
from fastsae.evaluate.metrics import Evaluation, evaluate
from fastsae.evaluate.model import ModelEvaluation, evaluate_in_model
from fastsae.evaluate.report import write_report
from fastsae.evaluate.synthetic import Recovery, SyntheticDictionary, score, write_activations

__all__ = [
    "Evaluation",
    "Example",
    "LatentExamples",
    "ModelEvaluation",
    "Recovery",
    "SyntheticDictionary",
    "evaluate",
    "evaluate_in_model",
    "score",
    "top_examples",
    "write_activations",
    "write_report",
]
