# shellcheck shell=bash
# Sourced by the scripts beside it: `cmpt_environment run` or `cmpt_environment test` puts a Python environment with
# everything that cmpt needs on PATH. The first call installs it; later ones only compare a fingerprint.
#
# An active virtual or conda environment is used as it is. Otherwise the environment is .venv in the repository.

cmpt_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

cmpt_fail() {
    printf 'cmpt: %s\n' "$*" >&2
    exit 1
}

cmpt_gpu_visible() {
    [[ -z ${CUDA_VISIBLE_DEVICES+set} || ${CUDA_VISIBLE_DEVICES} == [0-9GM]* ]] || return 1
    compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]]
}

# Says on standard error what the Python $1 lacks; silent and 0 where it will do. $2 names the modules it must have.
cmpt_check_python() {
    "$1" - "$2" <<'PYTHON'
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d, older than 3.11" % sys.version_info[:2])
for module in sys.argv[1].split():
    if importlib.util.find_spec(module) is None:
        sys.exit("has no module %s (on Debian: apt-get install python3-venv)" % module)
# DeepSpeed's CPU collectives and Triton's launchers are compiled against Python at first use.
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("has no Python.h (on Debian: apt-get install python3-dev)")
PYTHON
}

# Prints a Python >= 3.11 that can make a virtual environment, or fails with what each Python found lacks.
cmpt_find_python() {
    local name path lacks faults=""
    for name in python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3; do
        path=$(command -v "$name") || continue
        if lacks=$(cmpt_check_python "$path" "venv ensurepip" 2>&1); then
            printf '%s\n' "$path"
            return
        fi
        faults+=$'\n'"  $path ${lacks%%$'\n'*}"
    done
    cmpt_fail "needs Python 3.11 or newer with its venv module and its headers; found:${faults:- none}"
}

cmpt_check_compiler() {
    local name
    for name in ${CXX:+"$CXX"} c++ g++ clang++; do
        if command -v "$name" >/dev/null; then
            [[ -n ${CXX:-} || $name == c++ ]] || export CXX=$name
            return
        fi
    done
    cmpt_fail "needs a C++ compiler, with which DeepSpeed builds its CPU collectives (on Debian: apt-get install g++)"
}

# cmpt_logged LOG LABEL COMMAND...: the command's output goes to LOG; a terminal shows the time and LOG's last line.
cmpt_logged() {
    local log=$1 label=$2 start=$SECONDS ticker="" status=0
    shift 2
    printf 'cmpt: %s\n' "$label" >&2
    if [[ -t 2 ]]; then
        while kill -0 $$ 2>/dev/null; do
            printf '\r\033[K  %4d s  %.60s' "$((SECONDS - start))" "$(tail -n 1 "$log" | tr -d '\r')" >&2
            sleep 1
        done &
        ticker=$!
    fi
    "$@" </dev/null >>"$log" 2>&1 || status=$?
    if [[ -n $ticker ]]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        printf '\r\033[K' >&2
    fi
    if ((status != 0)); then
        tail -n 20 "$log" >&2
        cmpt_fail "failed: $label. The whole log: $log"
    fi
    printf 'cmpt: done in %d s\n' "$((SECONDS - start))" >&2
}

# cmpt_build_cpu_collectives PREFIX: compiles DeepSpeed's shared-memory collectives with the environment's own ninja
# (another release would find its log unreadable and compile again), so that no run and no test waits for it later.
cmpt_build_cpu_collectives() {
    PATH=$1/bin:$PATH DS_ACCELERATOR=cpu "$1/bin/python" - <<'PYTHON'
import deepspeed
from deepspeed.accelerator import get_accelerator

builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
    builder.load()
PYTHON
}

# cmpt_install PREFIX PART...
cmpt_install() {
    local prefix=$1 python=$1/bin/python log=$1/cmpt-install.log fingerprint base extras="" pins=()
    shift
    local parts=" $* "

    if [[ $prefix == "$cmpt_root/.venv" ]]; then
        # A .venv that was copied or moved has the old path in its scripts.
        if ! "$python" -c '' 2>/dev/null ||
            { [[ -f $prefix/bin/activate ]] && ! grep -qF "$prefix" "$prefix/bin/activate"; }; then
            base=$(cmpt_find_python) || exit 1
            "$base" -m venv --clear "$prefix" || cmpt_fail "could not make a virtual environment with $base"
        fi
    fi
    : >"$log" || cmpt_fail "cannot write to the environment $prefix"
    "$python" -m pip --version >>"$log" 2>&1 || "$python" -m ensurepip >>"$log" 2>&1 ||
        cmpt_fail "the environment $prefix has no pip"

    fingerprint=$(cmpt_fingerprint "$prefix")
    # An environment of the user's that holds PyTorch keeps its versions as far as pyproject.toml allows them.
    if [[ $prefix == "$cmpt_root/.venv" ]] || ! "$python" -c 'import torch' 2>/dev/null; then
        pins=(--constraint "$cmpt_root/tools/constraints.txt")
    fi
    [[ $parts != *" test "* ]] || extras+=",test,open-clip"
    [[ $parts != *" gpu "* ]] || extras+=",gpu"
    cmpt_logged "$log" "installing into $prefix (2 to 10 minutes the first time)" \
        "$python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        "${pins[@]}" --editable "$cmpt_root${extras:+[${extras#,}]}"
    if [[ $parts == *" cpu "* ]]; then
        cmpt_logged "$log" "compiling DeepSpeed's CPU collectives (1 to 3 minutes the first time)" \
            cmpt_build_cpu_collectives "$prefix"
    fi
    rm -f "$log"
    printf '%s %s\n' "$fingerprint" "$*" >"$prefix/.cmpt-installed"
}

# cmpt_is_installed PREFIX FINGERPRINT PART...
cmpt_is_installed() {
    local stamp=$1/.cmpt-installed fingerprint=$2 known part
    shift 2
    [[ -f $stamp ]] && known="$(<"$stamp") " || return 1
    for part in "$fingerprint" "$@"; do
        [[ " $known" == *" $part "* ]] || return 1
    done
}

# cmpt_fingerprint PREFIX: what an installation depends on, besides its parts.
cmpt_fingerprint() {
    { cat "$cmpt_root/pyproject.toml" "$cmpt_root/tools/constraints.txt" && echo "$cmpt_root" &&
        { "$1/bin/python" -V 2>/dev/null || true; }; } | sha256sum | cut -c1-32
}

cmpt_environment() {
    local level=$1 prefix=$cmpt_root/.venv parts=(run) lacks lock
    [[ $level == run ]] || parts+=("$level")
    if cmpt_gpu_visible; then
        parts+=(gpu)
    else
        parts+=(cpu)
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    fi

    cmpt_check_compiler
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        prefix=$VIRTUAL_ENV
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        prefix=$CONDA_PREFIX # conda's base is left alone: it is often active without being meant
    fi
    if ! cmpt_is_installed "$prefix" "$(cmpt_fingerprint "$prefix")" "${parts[@]}"; then
        if [[ $prefix != "$cmpt_root/.venv" ]]; then
            lacks=$(cmpt_check_python "$prefix/bin/python" "" 2>&1) ||
                cmpt_fail "the active environment's $prefix/bin/python ${lacks%%$'\n'*}"
        fi
        exec {lock}>>"$cmpt_root/pyproject.toml" # a second start waits here until the first has installed
        flock "$lock"
        cmpt_is_installed "$prefix" "$(cmpt_fingerprint "$prefix")" "${parts[@]}" ||
            cmpt_install "$prefix" "${parts[@]}"
        exec {lock}>&-
    fi
    export PATH=$prefix/bin:$PATH
    if [[ $prefix != "${CONDA_PREFIX:-}" ]]; then
        export VIRTUAL_ENV=$prefix
    fi
}
