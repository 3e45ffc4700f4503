"""Training data: the row format, LLaMA-Factory's view of it (template, dataset names) and self-distillation."""

from .rows import TEMPLATE_NAME, is_self_distilled


__all__ = ["TEMPLATE_NAME", "is_self_distilled"]
