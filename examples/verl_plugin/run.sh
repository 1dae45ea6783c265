#!/usr/bin/env bash
# verl 0.9's GSM8K run with SEGA in place of GRPO, on one GPU: bash run.sh MODEL DATA_FOLDER [more of verl's settings]
set -euo pipefail
model=$1 data=$2
shift 2

export VERL_USE_EXTERNAL_PLUGINS=gem_kernels
export VERL_USE_EXTERNAL_MODULES=gem_kernels.integrations.verl_sega

python -m verl.trainer.main_ppo \
    trainer.v1.trainer_mode=sega \
    algorithm.adv_estimator=sega \
    +algorithm.sega.marker='####' \
    +algorithm.sega.fork_weight=1.0 \
    +algorithm.sega.top_m=0.1 \
    algorithm.use_kl_in_reward=False \
    data.train_files="$data/train.parquet" \
    data.val_files="$data/test.parquet" \
    data.train_batch_size=64 \
    data.max_prompt_length=512 \
    data.max_response_length=512 \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.model.use_fused_kernels=True \
    actor_rollout_ref.model.fused_kernel_options.impl_backend=torch \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.01 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    trainer.n_gpus_per_node=1 \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    trainer.logger='["console"]' \
    "$@"
