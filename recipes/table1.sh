#!/usr/bin/env bash
# Every row of ToolUPT's Table 1 and Figure 4 for one model, one after the other; resumes if interrupted.
#   bash recipes/table1.sh recipes/qwen2.5-7b.args                the paper's, 8 GPUs
#   RANKS=2 bash recipes/table1.sh recipes/demo.args              the toy world on a laptop
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=$1
for algo in sft grpo dapo dapo_star fg_dapo_star sft_dapo_star sft_fg_dapo_star luffy srft chord \
            toolupt toolupt_no_fgae toolupt_no_spo; do
    torchrun --nproc_per_node="${RANKS:-8}" train.py "@$recipe" --algo "$algo" \
        --output_dir "runs/$(basename "$recipe" .args)/$algo" --resume_from_checkpoint latest
done
