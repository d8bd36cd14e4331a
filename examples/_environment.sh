# Sourced by examples/*.sh and tests/run.sh from the repository root: sets and exports PYTHON, an interpreter that has
# what this repository needs.
#   STEEL_PYTHON   an interpreter to use exactly as it is (a container, a cluster module): nothing is installed
#   VIRTUAL_ENV    an active environment is used; what it lacks is installed into it
#   otherwise      .venv is made here and filled
#   STEEL_EXTRAS   extras of setup.cfg to install: log (default) or dev

STEEL_EXTRAS=${STEEL_EXTRAS:-log}
STEEL_VERSION_CHECK='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

steel_fail() {
  echo "error: $1" >&2
  exit 1
}

# Prints the first interpreter this repository supports that can make environments.
steel_find_python() {
  local name
  for name in python3.11 python3.12 python3 python; do
    if "$name" -c "$STEEL_VERSION_CHECK; import ensurepip, venv" 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

# Prints what the extras $2 need and interpreter $1 does not have: requirements on one line, empty when all is there.
steel_missing() {
  "$1" - "$2" <<'PY'
import configparser, importlib.metadata, sys

setup = configparser.ConfigParser()
setup.read("setup.cfg")
extras = setup["options.extras_require"]
wanted = [setup["options"]["install_requires"], extras[sys.argv[1]]]
if sys.argv[1] == "dev":
    wanted.append(extras["log"])
try:
    from packaging.requirements import Requirement
except ImportError:
    sys.exit(print("packaging and all others"))
lines = [line.strip() for block in wanted for line in block.splitlines()]
missing = []
for requirement in map(Requirement, filter(None, lines)):
    if requirement.name == "megatron_steel":
        continue
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        missing.append(str(requirement))
        continue
    if not requirement.specifier.contains(found, prereleases=True):
        missing.append(f"{requirement} (has {found})")
print(", ".join(missing))
PY
}

# Installs this repository with the extras $2 for interpreter $1, into the environment named $3.
steel_install() {
  local start=$SECONDS
  echo "Installing into $3, about 5 minutes the first time (torch, megatron-core, transformers ...)"
  "$1" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$2]" ||
    steel_fail "pip could not install the packages (see above); start again to go on"
  echo "Installed in $((SECONDS - start)) s"
}

if [ -n "${STEEL_PYTHON:-}" ]; then
  PYTHON=$STEEL_PYTHON
  "$PYTHON" -c "$STEEL_VERSION_CHECK" || steel_fail "STEEL_PYTHON=$PYTHON is not a Python 3.11 or 3.12"
  steel_lacks=$(steel_missing "$PYTHON" "$STEEL_EXTRAS")
  [ -z "$steel_lacks" ] || steel_fail "STEEL_PYTHON=$PYTHON lacks: $steel_lacks. Install that, or unset STEEL_PYTHON to use .venv"
elif [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$PWD/.venv" ]; then
  PYTHON=$VIRTUAL_ENV/bin/python
  "$PYTHON" -c "$STEEL_VERSION_CHECK" || steel_fail "the active environment $VIRTUAL_ENV is not Python 3.11 or 3.12"
  steel_lacks=$(steel_missing "$PYTHON" "$STEEL_EXTRAS")
  if [ -n "$steel_lacks" ]; then
    echo "The active environment lacks: $steel_lacks"
    steel_install "$PYTHON" "$STEEL_EXTRAS" "$VIRTUAL_ENV"
  fi
else
  PYTHON=$PWD/.venv/bin/python
  if ! "$PYTHON" -c "$STEEL_VERSION_CHECK; import pip" 2>/dev/null; then
    steel_base=$(steel_find_python) || steel_fail "no Python 3.11 or 3.12 with venv and ensurepip found (Debian: python3.11-venv)"
    echo "Making .venv with $("$steel_base" --version)"
    "$steel_base" -m venv --clear .venv || steel_fail "$steel_base -m venv .venv failed (see above)"
  fi
  # The stamp is named after what was installed from: a changed pin installs again, other extras only when missing.
  steel_stamp=.venv/steel-$(cat setup.cfg constraints.txt | cksum | tr ' ' -)
  if [ ! -f "$steel_stamp" ] || [ -n "$(steel_missing "$PYTHON" "$STEEL_EXTRAS")" ]; then
    steel_install "$PYTHON" "$STEEL_EXTRAS" .venv
    touch "$steel_stamp"
  fi
fi

# Scripts started from here use the same interpreter and import this checkout, not another one that is installed.
export PYTHON STEEL_PYTHON=$PYTHON PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
export PATH

# Runs module $1 with its flags on RANKS processes of each of NNODES nodes, of which this is NODE_RANK.
steel_launch() {
  local where=(--nproc-per-node "$RANKS" --nnodes "$NNODES" --node-rank "$NODE_RANK") threads=$(($(nproc) / RANKS))
  # One node needs no agreed port: torchrun finds a free one.
  if [ "$NNODES" -gt 1 ]; then
    where+=(--master-addr "$MASTER_ADDR" --master-port "$([ "$MASTER_PORT" -gt 0 ] && echo "$MASTER_PORT" || echo 29500)")
  else
    where+=(--standalone)
  fi
  # torchrun would set one thread and print a page about it.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} "$PYTHON" -m torch.distributed.run "${where[@]}" -m "$@"
}
