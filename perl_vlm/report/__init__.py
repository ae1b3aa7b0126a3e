"""What a run shows to people: a self-contained HTML report and a model card. Knows no task and imports no torch."""
