"""The main job: from a model and queries to a control file.

queries -> pairs -> activations -> directions -> edits -> control file. Each stage leaves its result in a work
directory, so that an interrupted job goes on where it stopped.
"""

from alignez_gguf.pipeline.export import Export, export, score_control
from alignez_gguf.pipeline.job import Aspect, EditScoringEngine, Job, Settings
from alignez_gguf.pipeline.recipes import RecipeResult
from alignez_gguf.pipeline.stages import self_generated_pairs

__all__ = [
    "Aspect",
    "EditScoringEngine",
    "Export",
    "Job",
    "RecipeResult",
    "Settings",
    "export",
    "score_control",
    "self_generated_pairs",
]
