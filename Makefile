# Every target sets up .venv by itself when it is missing or older than pyproject.toml.
ifeq ($(OS),Windows_NT)  # make of MinGW, which runs its lines in Git's sh
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
READY := .venv/.installed
TAG ?= $(shell git describe --tags --exact-match 2>/dev/null)

.PHONY: help demo demo-vl demo-vlm test test-fast test-slow test-oldest test-elsewhere test-beside test-wheel fuzz kill mutations bench gpu rehearsal docs lint audit format samples dist tag clean

help:  ## these targets, each with what it does
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(READY)

demo: $(READY)  ## train a style adapter on the embedded model, score it, and show before and after on a sheet and a page
	$(BIN)/dora-mm train configs/sdxl/demo.yaml
	$(BIN)/dora-mm eval configs/sdxl/eval_demo.yaml
	$(BIN)/dora-mm gallery runs/eval_demo/latest

demo-vl: $(READY)  ## the embedded VL-BART learns to answer questions about scenes, and shows what it answers
	$(BIN)/dora-mm train configs/vl_bart/demo.yaml
	$(BIN)/dora-mm eval configs/vl_bart/eval_demo.yaml --set adapter=runs/demo_vl/latest

demo-vlm: $(READY)  ## the same with a language model: EfficientNet-Lite0 and SmolLM2-135M, joined in transformers' FastVLM
	$(BIN)/python -m samples.build tiny-vlm
	$(BIN)/dora-mm train configs/vlm/demo.yaml
	$(BIN)/dora-mm eval configs/vlm/eval_demo.yaml --set adapter=runs/demo_vlm/latest

test: $(READY)  ## two workers, a thread each: faster than two threads for models this small; what Python compiles is kept
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-fast: $(READY)  ## the folders that need no model, also on macOS and Windows
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		tests/config tests/data tests/utils tests/cli tests/registries

test-slow: $(READY)  ## quantised bases and TRL come from folders of their own: peft and diffusers import the former wherever they are
	$(BIN)/python -m pytest -m slow -s
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/quant "bitsandbytes>=0.48" "torchao>=0.14"
	PYTHONPATH=build/quant $(BIN)/python -m pytest tests/core/wrappers/test_quantized.py \
		tests/core/wrappers/test_sharded.py tests/models/vl/vlm/test_quantized.py
	PYTHONPATH=build/quant $(BIN)/python -m pytest -m slow -k "quantized or heads" tests/peft/test_quantized.py \
		tests/models/images/test_quantized.py tests/pipelines/images/test_combinations.py \
		tests/preview/test_image_memory.py tests/pipelines/test_two_processes.py
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/trl trl datasets dill multiprocess xxhash pandas
	PYTHONPATH=build/trl $(BIN)/python -m pytest -m slow tests/peft/test_trl.py

test-oldest:  ## with the oldest releases that pyproject.toml admits, of the base (no transformers 5) and of the recipes: 10 GB in build/oldest
	@for each in base recipes; do test -x build/oldest/$$each/bin/python || $(PYTHON) -m venv build/oldest/$$each; \
		build/oldest/$$each/bin/python -m pip install --quiet uv; done
	build/oldest/base/bin/uv pip install --quiet --python build/oldest/base/bin/python --resolution lowest-direct \
		--editable . pytest==8.4.2 hypothesis==6.140.0 pillow==12.0.0
	OMP_NUM_THREADS=1 build/oldest/base/bin/python -m pytest tests/core tests/peft/test_formula.py tests/peft/test_layers.py \
		--ignore tests/core/test_unet.py --ignore tests/core/wrappers/test_experts.py \
		--ignore tests/core/wrappers/test_quantized.py --ignore tests/core/wrappers/test_streaming.py
	build/oldest/recipes/bin/uv pip install --quiet --python build/oldest/recipes/bin/python --resolution lowest-direct \
		--only-binary resvg-py --editable ".[test,eval,optim,track,samples,sheets,heic,vl,docs]"
	OMP_NUM_THREADS=1 build/oldest/recipes/bin/python -m pytest -n 2 --dist worksteal

test-beside:  ## pip beside other trainers, and fuse_peft with the releases that they pin: 5 GB in build/beside
	$(PYTHON) -m tests.beside $(BESIDE)

test-elsewhere:  ## on other days, locales, paths and Pythons, 15 minutes each: 6 GB in build/elsewhere; ELSEWHERE="--pythons 3.13"
	$(PYTHON) -m tests.elsewhere $(ELSEWHERE)

test-wheel: dist  ## the wheel alone in new environments from PyPI: imports with the base, and a training with recipes; 12 GB in build/wheel
	$(BIN)/python -m tests.installed dist/*.whl

fuzz: $(READY)  ## an hour of mutated files through every door, from a seed that no run had; FUZZ="--seed 3 --seconds 600"
	$(BIN)/python -m tests.fuzz --seed $$(date +%s) $(FUZZ)

kill: $(READY)  ## commands that write, disturbed at each file event and repeated; KILL="--each 20 --commands train"
	$(BIN)/python -m tests.kill $(KILL)

mutations: $(READY)  ## single lines made wrong, each of which the tests of its room must notice in 60 s; MUTATIONS="--only VAE"
	$(BIN)/python -m tests.mutations $(MUTATIONS)

bench: $(READY)  ## what DoRA costs beside its peers on this machine; BENCH="--quick" or "--all"
	$(BIN)/python -m tests.benchmarks.bench_peers $(BENCH)

gpu:  ## all that only a GPU can show, in 20 minutes, with what PYTHON has: no .venv; ONLY="trial block", SECONDS=600, DRY=1 on a CPU
	$(PYTHON) -m tests.benchmarks.gpu $(ONLY) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(DRY),--dry) \
		$(if $(INPUTS),--inputs $(INPUTS))

rehearsal: $(READY)  ## full-size models with random weights, 0.5 to 41 GB of disk one at a time; ONLY="vlm sdxl", KEEP=1, DRY=1
	$(BIN)/python -m tests.rehearsal $(ONLY) $(if $(KEEP),--keep) $(if $(DRY),--dry)

docs: $(READY)  ## the site in build/site/public, strictly, with pictures of what commands write: some minutes; DOCS=--without-examples
	$(BIN)/python docs/site/build.py build/site $(DOCS)

lint: $(READY)  ## ruff, pyright, and the schemas of workflows, forms and CITATION.cff
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/actionlint .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format --force-filetype yaml CITATION.cff
	$(BIN)/shellcheck configs/cluster/*.sbatch && $(BIN)/hadolint configs/cluster/Dockerfile

audit: $(READY)  ## published holes in the oldest releases that are admitted, where their index answers
	@test -x build/audit/bin/python || $(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install --quiet pip-audit || true
	$(BIN)/python -m tests.audit build/audit/bin/pip-audit

format: $(READY)  ## ruff's fixes and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

samples: $(READY)  ## the icons, bricks and scenes that samples/ and the pretrainings are made from
	$(BIN)/python -m samples.build icons
	$(BIN)/python -m samples.build scenes

dist: $(READY)  ## the wheel and the source archive in dist/, checked as PyPI does
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

tag:  ## that a tag is the version, and CHANGELOG.md and CITATION.cff have its date; TAG=v0.1.0, default: that of the commit
	$(PYTHON) -m tests.release $(TAG)

clean:  ## removes build, dist and caches; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache
