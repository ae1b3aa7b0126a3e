"""The evaluation suite: evidence for or against a model, with honest statistics. See docs/eval-suite.md."""
