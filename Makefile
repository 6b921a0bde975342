# make demo   the whole job on the embedded pictures: both stages, a sheet of samples, figures; 15 minutes, or BUDGET=30
# make test   all tests but drills   make check  ruff, mypy, fast tests   make lint   ruff, mypy
# make drills what takes long: runs killed again and again, further variants of what the tests show; every night
# make app    pages in a browser to learn, train, draw and judge: http://localhost:8501
# All set up a virtual environment in .venv first.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/openmoji
BUDGET ?= 15
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.PHONY: setup app demo test test-browser drills lint check

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -e '.[demo,test]' -c constraints.txt
	touch $@

app: .venv/.app
	$(BIN)/ldm-app

.venv/.app: .venv/.ready
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -e '.[app]' -c constraints.txt
	touch $@

demo: setup
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) train_ldm.py --config configs/openmoji.yaml run.dir=$(RUN) \
		--budget $(BUDGET)
	$(BIN)/python scripts/evaluate.py $(RUN) --images 0
	@echo "Look at $(RUN)/samples.png. Then: $(BIN)/python scripts/txt2img.py --model $(RUN)/pipeline --prompt 'red heart' --out heart.png"

# Test modules, whose assertions pytest rewrites, are kept compiled for the next time, whatever the environment says.
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not drill and not browser"

drills: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m drill

test-browser: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not browser"
