"""Measure, draw and report what a quantized model costs. Needs the `recipes` extra."""

from tdq_plugin.study.dynamics import TemporalDynamics, temporal_dynamics
from tdq_plugin.study.metrics import FrechetReference, classifier_score
from tdq_plugin.study.report import write_report
from tdq_plugin.study.schema import Report, ReportRow, validate_report

__all__ = [
    "FrechetReference",
    "Report",
    "ReportRow",
    "TemporalDynamics",
    "classifier_score",
    "temporal_dynamics",
    "validate_report",
    "write_report",
]
