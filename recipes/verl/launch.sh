# Sourced by the recipes: starts verl with the array `options` and what was given on the command line, which wins.
# --dry-run first: checks every option against the verl that is installed, and starts nothing.
set -euo pipefail
run=(python3 -m verl.trainer.main_ppo)
if [[ "${1:-}" == --dry-run ]]; then
    shift
    run=(python3 -W ignore -m gvpo.integrations.verl_runs.dry_run)
fi
exec "${run[@]}" "${options[@]}" "$@"
