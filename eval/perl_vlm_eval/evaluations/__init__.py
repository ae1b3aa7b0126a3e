"""What a suite can measure, by the word that stands under ``kind``."""

from __future__ import annotations

from perl_vlm_eval.evaluations.base import Evaluation
from perl_vlm_eval.evaluations.factuality import Factuality
from perl_vlm_eval.evaluations.hacking import Hacking
from perl_vlm_eval.evaluations.policies import Policies
from perl_vlm_eval.evaluations.published_sets import PublishedSets
from perl_vlm_eval.evaluations.resources import Resources
from perl_vlm_eval.evaluations.reward_models import RewardModels

KINDS: dict[str, type[Evaluation]] = {
    kind.kind: kind for kind in (RewardModels, Policies, Hacking, Factuality, PublishedSets, Resources)
}
