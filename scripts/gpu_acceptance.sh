#!/usr/bin/env bash
# Measures training and sampling on one GPU and checks what only a GPU can show, in twelve steps: docs/gpu-acceptance.md
#
#   scripts/gpu_acceptance.sh OUT [--smoke] [--steps A-B]
#
# Writes OUT/results.jsonl; a step that fails or takes too long is a line there, and the next one runs. `--smoke` tries
# every step at its smallest size on a CPU. PYTHON is the interpreter; FIXTURES a folder for 5 GB, or OUT/fixtures.
set -u

usage() { echo "usage: $0 OUT [--smoke] [--steps A-B], steps 0 to 11" >&2; exit 2; }

out='' smoke='' first=0 last=11
while (($#)); do
  case $1 in
    --smoke) smoke=1 ;;
    --steps)
      [[ ${2-} =~ ^([0-9]|1[01])(-([0-9]|1[01]))?$ ]] || usage
      first=${BASH_REMATCH[1]} last=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
      shift ;;
    -*) usage ;;
    *) [[ -z $out ]] || usage; out=$1 ;;
  esac
  shift
done
if [[ -z $out ]] || ((first > last)); then usage; fi
mkdir -p "$out" || exit 2
root=$(cd "$(dirname "$0")/.." && pwd) out=$(cd "$out" && pwd)
python=${PYTHON:-python3} results=$out/results.jsonl scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap stop INT TERM
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
[[ -z $smoke ]] || export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
fixtures=${FIXTURES:-$out/fixtures${smoke:+-smoke}}

stop() { # steps run in process groups of their own, which get no Ctrl-C
  local pid_file
  for pid_file in "$scratch"/pid-*; do [[ ! -e $pid_file ]] || kill "$(<"$pid_file")"; done
  exit 130
}

selected() { ((first <= $1 && $1 <= last)); }

line() { "$python" "$root/scripts/benchmark_results.py" "$results" "$@"; }

skip() { # NUMBER NAME REASON
  line "step=$1" "name=$2" status=skipped seconds=0 "why=$3"
}

run() { # NUMBER SECONDS NAME SCRIPT ARGUMENTS…
  if [[ -z $smoke ]] || (($1 < 3)); then
    try "$@"
    return
  fi
  while (($(jobs -rp | wc -l) > 1)); do wait -n; done # two at a time: from step 3 on none needs another's figures
  try "$@" &
}

try() {
  local number=$1 limit=$(($2 * patience)) name=$3 start=$SECONDS log=$scratch/stderr-$1 status error
  shift 3
  echo "== step $number: $name"
  timeout -k 5 $limit "$python" "$root/scripts/$1" "${@:2}" 2>"$log" &
  echo $! >"$scratch/pid-$number"
  wait $!
  status=$?
  rm -f "$scratch/pid-$number"
  if ((status == 0)); then
    line "step=$number" "name=$name" status=passed "seconds=$((SECONDS - start))"
    return
  fi
  touch "$scratch/failed"
  { echo "== step $number: $name" && tr '\r' '\n' <"$log"; } | tee -a "$out/errors.log" | tail -n 20 >&2
  error=$(tr '\r' '\n' <"$log" | grep -vE '^ *$|resource_tracker|warnings.warn' | tail -n 1)
  case $status in
    124) error="took more than $limit s; the last line: $error" ;;
    137) error="killed after $((SECONDS - start)) of $limit s; the last line: $error" ;;
  esac
  line "step=$number" "name=$name" status=failed "seconds=$((SECONDS - start))" "error=${error:0:500}"
}

measure() { # NUMBER SECONDS NAME SUBJECT ARGUMENTS…
  run "$1" "$2" "$3" benchmark.py "$4" --json "$results" --label "$1" "${@:5}"
}

train() { # NUMBER SECONDS NAME ROWS ARGUMENTS…
  measure "$1" "$2" "$3" train --config "$fixtures/stage2.yaml" --steps "$steps" --rows "$4" "${@:5}"
}

if [[ -n $smoke ]]; then
  xformers='' half=no patience=10 steps=4 small=(--batch 1 --rounds 1 --size 64) few=(--batch 2 --rounds 1)
else
  probe='import importlib.util as u, torch; print(torch.cuda.is_available(), bool(u.find_spec("xformers")))'
  devices=$("$python" -c "$probe")
  [[ $devices == True* ]] || { echo "error: torch finds no GPU; --smoke tries the steps on a CPU" >&2; exit 2; }
  xformers=${devices#True } half=fp16 patience=1 steps=12 small=(--batch 32) few=(--batch 16 --rounds 2)
fi

if selected 0 || [[ ! -f $fixtures/tiny.yaml ]]; then
  run 0 45 'fixtures' benchmark_fixtures.py "$fixtures" ${smoke:+--smoke}
fi
if selected 1; then
  kernels=sdpa
  [[ -z $smoke ]] || kernels=eager,sdpa
  [[ $xformers != True ]] || kernels=sdpa,xformers
  measure 1 20 'kernels of attention' attention --precision bf16 --rows $kernels "${small[@]}"
fi
if selected 2; then train 2 95 'the reference and ours' reference-bf16,ours-bf16; fi
if selected 3; then
  innermost=ours-bf16+stage2.channels_last=true
  if [[ -n $smoke ]]; then
    train 3 125 'channels last' $innermost --baseline 'ours, bf16'
    skip 3 'compiled' 'needs CUDA'
  else
    train 3 125 'channels last, and compiled' "$innermost,$innermost+stage2.compile=true" --baseline 'ours, bf16'
  fi
fi
if selected 4; then
  if [[ $xformers == True ]]; then
    train 4 45 'xformers' ours-bf16+stage2.attention_backend=xformers --baseline 'ours, bf16'
  elif [[ -n $smoke ]]; then
    train 4 45 'sdpa' ours-bf16+stage2.attention_backend=sdpa --baseline 'ours, bf16'
  else
    skip 4 'xformers' 'xformers is not installed'
  fi
fi
if selected 5; then train 5 45 "${half/no/float32}" ours-$half --baseline 'ours, bf16'; fi
if selected 6; then train 6 45 '4 at a pass' ours-bf16+stage2.device_batch=4 --baseline 'ours, bf16' --steps 6; fi
sample=(sample --model "$fixtures/pipeline")
if selected 7; then
  measure 7 45 'sampling against diffusers' "${sample[@]}" --rows diffusers-bf16,ours-bf16 "${few[@]}"
fi
if selected 8; then
  compile=graphs
  [[ -z $smoke ]] || compile=no
  measure 8 55 'one image with CUDA graphs' "${sample[@]}" --rows ours-bf16 --count 1 --compile $compile \
    --baseline 'diffusers, bf16'
fi
if selected 9; then
  rows=plain-bf16,discriminator-bf16
  [[ -z $smoke ]] || rows=discriminator-no+stage1.gan.channels=4
  measure 9 50 'stage one' stage1 --config "$fixtures/stage1.yaml" --steps $((2 * steps / 3 + 2)) --rows $rows
fi
if selected 10; then
  run 10 45 'killed and continued' resume_drill.py "$scratch/drill" --config "$fixtures/tiny.yaml" \
    --json "$results" --label 10
fi
if selected 11; then
  if [[ -n $smoke ]]; then
    skip 11 'waits of the host' 'needs CUDA'
  else
    run 11 30 'waits of the host' count_synchronizations.py --config "$fixtures/tiny.yaml" --json "$results" --label 11
  fi
fi

wait
echo
"$python" "$root/scripts/benchmark_results.py" "$results"
[[ ! -e $scratch/failed ]]
