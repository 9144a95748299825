#!/usr/bin/env bash
# What only a GPU can tell, in nine minutes: its tests, then bench.py's commands. Each adds its table to
# results/<gpu>/README.md and its figures to N.json there. Teachers are timed where diffusers is installed.
#     make gpu
#     DEVICE=cpu FLAGS=--no-compile CONFIGS=tiny SIZES=16x16 bash results/gpu.sh          # only tries it
set -u -o pipefail
: "${PYTHON:=python3}" "${DEVICE:=cuda}" "${FLAGS:=}" "${CONFIGS:=ltx dc hunyuan}" "${SIZES:=512x512 720x1280}"
name=$DEVICE
if [ "$DEVICE" != cpu ]; then
    name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name())" 2>/dev/null) ||
        { echo "error: no GPU that PyTorch sees here: make gpu measures on one" >&2; exit 1; }
fi
teacher=$("$PYTHON" -c "import diffusers" 2>/dev/null && echo --teacher)
out=results/$(echo "$name" | tr 'A-Z ' 'a-z-')
first=${SIZES%% *}
n=0
mkdir -p "$out"
printf '# %s\n' "$name" > "$out/README.md"

run() {                                     # a command, in what is left of the time, and what it prints in Markdown
    local left=$((530 - SECONDS)) status=0
    printf '\n`python %s`\n\n```\n' "$*"
    if ((left < 1)); then echo "no time left"; else timeout --foreground -k 9 $left "$PYTHON" "$@" 2>&1; status=$?; fi
    echo '```'
    return $status
}

measure() {
    n=$((n + 1))
    run bench.py "$@" $FLAGS --device "$DEVICE" --out "$out" | tee -a "$out/README.md"
    mv -f "$out/bench.json" "$out/$n.json" 2>/dev/null
    rm -f "$out/bench.png"
}

run -m pytest -q -m gpu tests/test_gpu.py | tee -a "$out/README.md"
tests=$?
for size in $SIZES; do
    for config in $CONFIGS; do measure --decode $teacher --config "$config" --size "$size" --rounds 7; done
done
measure --blocks --config "${CONFIGS%% *}" --size "$first" --rounds 7
for config in $CONFIGS; do
    measure --stream --decode --config "$config" --size "$first" --rounds 3 --lengths 10 100
done
exit $tests
