#!/usr/bin/env bash
# Two vLLM servers and a training on one processor: SmolLM2-135M learns to add three numbers.
#
#     bash examples/servers/two_servers.sh FOLDER
#
# FOLDER must not exist; it gets the logs and the adapter. FIRST_PORT is the port of the first server (8000).
# Further words are options of `treepo-trl quickstart`: `--max_steps 20` for a training that learns.
set -euo pipefail
folder=$1
shift
port=${FIRST_PORT:-8000}
model=${MODEL:-$(python -c "
from treepo_trl.quickstart.model import default_folder, small_model
print(small_model(default_folder()))")}
mkdir -p "$(dirname "$folder")"
mkdir "$folder"

servers=()
trap 'kill "${servers[@]}" 2> /dev/null || true; wait' EXIT
for i in 0 1; do
  MODEL=$model bash "$(dirname "$0")/serve_cpu.sh" --port $((port + i)) > "$folder/server-$i.log" 2>&1 &
  servers+=($!)
done
sleep 10
for i in 0 1; do
  kill -0 "${servers[$i]}" 2> /dev/null || { echo "Server $i has ended: $(tail -n 1 "$folder/server-$i.log")" >&2; exit 1; }
done

treepo-trl quickstart --model_name_or_path "$model" --output_dir "$folder/run" --max_steps 3 --use_cpu true \
  --dtype float32 --use_vllm true --vllm_mode server --vllm_server_timeout 600 \
  --vllm_server_base_url "http://127.0.0.1:$port,http://127.0.0.1:$((port + 1))" "$@"
