"""verl's synchronous trainer with the advantages of SEGA: each completion's score is made of its own token entropies.

    VERL_USE_EXTERNAL_MODULES=gem_kernels.integrations.verl_sega python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=sega algorithm.adv_estimator=sega +algorithm.sega.marker='####' ...

verl stores the entropy of every sampled token beside the old log-probs, but hands it to no estimator: this trainer
does, and everything else is verl's. Settings: settings.py. Importing this imports verl's trainers and registers this
one and the estimator; written for verl 0.9.
"""

from __future__ import annotations

from typing import Any

import verl
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer, trainer_base

from .. import arguments
from ..answers import answer_start
from .swap import check_parameters
from .verl import WRITTEN_FOR, Stored, register_sega, sega_settings, stored

for _name, _parameters in {"_compute_advantage": "self batch metrics", "__init__": "self config"}.items():
    _found = getattr(PPOTrainerSync, _name, None)
    check_parameters("verl", WRITTEN_FOR, verl.__version__, f"PPOTrainerSync.{_name}", _found, _parameters)


@register_trainer("sega")
class SegaTrainer(PPOTrainerSync):
    """`PPOTrainerSync` that shows each batch's stored entropies to the estimator "sega", and logs gem/*.

    Raises:
        ValueError: another estimator is set, or `rollout_correction.bypass_mode`, with which verl makes no entropies.
    """

    def __init__(self, config: Any):
        if config.algorithm.adv_estimator != "sega":
            arguments.fail("algorithm.adv_estimator", "'sega' with this trainer", repr(config.algorithm.adv_estimator))
        correction = config.algorithm.get("rollout_correction", None)
        if correction and correction.get("bypass_mode", False):
            arguments.fail("algorithm.rollout_correction.bypass_mode", "False: entropies come with old log-probs", True)
        self.sega = sega_settings(config.algorithm)
        config.trainer.v1.trainer_mode = "sync"  # what verl's own code asks for
        super().__init__(config)

    def _compute_advantage(self, batch: Any, metrics: dict) -> Any:
        fields = ["entropy", "responses", "response_mask"]
        stored_in = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = trainer_base.tq.kv_batch_get(**stored_in, select_fields=fields).to_padded_tensor()
        start = None
        if self.sega.marker is not None:
            texts = [self.sega.marker] if isinstance(self.sega.marker, str) else list(self.sega.marker)
            markers = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
            start = answer_start(data["responses"], markers, completion_mask=data["response_mask"].long())
        with stored(Stored(data["entropy"], start)) as shown:
            result = super()._compute_advantage(batch, metrics)
        metrics.update(shown.metrics or {})
        return result


register_sega()
