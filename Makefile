# Every target sets up what it needs: the first one to run creates .venv, later ones find it ready.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# Each worker begins with a half of the tests, so that what a file shares is made once.
SPREAD := -n $(WORKERS) --dist worksteal
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
EVAL ?= .venv-eval
DOCS ?= .venv-docs
VLLM ?= .venv-vllm
# One thread per worker: the models of the tests are too small to share.
SETTINGS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1
OLDEST_TESTS := tests/test_oracle.py tests/models $(addprefix tests/engine/test_,oracle_equality.py core_families.py shared_keys.py hybrid_decoders.py \
	generation.py later_turns.py static_cache.py moved_caches.py backends.py observations.py vision_scores.py summaries.py peek.py)
NEWEST_TESTS := tests/test_oracle.py tests/engine/test_oracle_equality.py tests/engine/test_generation.py tests/engine/test_later_turns.py
EVAL_TESTS := $(wildcard tests/harness tests/cluster)

.PHONY: demo test test-oldest test-release test-newest test-eval test-vllm check format readme docs gallery notebook clean

demo: $(INSTALLED)
	$(BIN)/autoprune demo

test: $(INSTALLED)
	$(SETTINGS) $(BIN)/python -m pytest $(SPREAD) $(ARGS)

# What depends on transformers, with the oldest release that is supported.
test-oldest: $(OLDEST)/.installed
	$(SETTINGS) $(OLDEST)/bin/python -m pytest $(SPREAD) $(or $(ARGS),$(OLDEST_TESTS))

# The same with any release between: make test-release TRANSFORMERS=5.23.0
test-release:
	test -n '$(TRANSFORMERS)' || { echo 'give a release, as in TRANSFORMERS=5.23.0'; exit 2; }
	test -x .venv-$(TRANSFORMERS)/bin/python || $(PYTHON) -m venv .venv-$(TRANSFORMERS)
	grep -v '^transformers==' constraints.txt > .venv-$(TRANSFORMERS)/constraints.txt
	.venv-$(TRANSFORMERS)/bin/python -m pip install --constraint .venv-$(TRANSFORMERS)/constraints.txt \
		transformers==$(TRANSFORMERS) --editable '.[dev]'
	$(SETTINGS) .venv-$(TRANSFORMERS)/bin/python -m pytest $(SPREAD) $(or $(ARGS),$(OLDEST_TESTS))

# What `pip install` gives today: no constraints, so the newest releases that pyproject.toml allows.
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager --editable '.[dev]'
	$(NEWEST)/bin/python -m pip list | grep -E '^(torch|transformers|numpy|peft) '
	$(NEWEST)/bin/autoprune demo --output $(NEWEST)/demo
	$(SETTINGS) $(NEWEST)/bin/python -m pytest $(SPREAD) $(or $(ARGS),$(NEWEST_TESTS))

# The evaluation harness and Ray, which take 3 GB: an environment of their own.
test-eval: $(EVAL)/.installed
	$(SETTINGS) HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 $(EVAL)/bin/python -m pytest $(or $(ARGS),$(EVAL_TESTS))

# The plugin of vLLM, with vLLM for the CPU: 3.5 GB, an environment of its own. Where the package index has no
# torch for the CPU, give pip one that has: PIP_EXTRA_INDEX_URL, as in the README.
test-vllm: $(VLLM)/.installed
	cd vllm && $(SETTINGS) $(abspath $(VLLM))/bin/python -m pytest $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the documentation repeats from the code: the families in the README, the page of methods.
readme: $(INSTALLED)
	$(BIN)/python tools/readme.py README.md

# The documentation as a site in site/; a broken link fails.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# The pictures of the documentation; that of the page needs chromium.
gallery: $(INSTALLED)
	$(BIN)/python tools/gallery.py docs/images/gallery
	$(BIN)/python tools/web_picture.py docs/images/web.png

# The notebook with what its cells print.
notebook: $(INSTALLED)
	$(BIN)/python tools/notebook.py examples/tour.ipynb

$(INSTALLED): constraints.txt pyproject.toml
$(OLDEST)/.installed: constraints-oldest.txt pyproject.toml
$(INSTALLED): EXTRAS := dev,web
$(OLDEST)/.installed: EXTRAS := dev
$(INSTALLED) $(OLDEST)/.installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --constraint $< --editable '.[$(EXTRAS)]'
	touch $@

$(DOCS)/.installed: constraints-docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --constraint $< mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# The harness asks for torchvision and works without it; its build for CUDA does not import beside a torch
# for the CPU, and then nothing of transformers does.
$(EVAL)/.installed: constraints-eval.txt pyproject.toml
	test -x $(EVAL)/bin/python || $(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --constraint constraints-eval.txt --editable '.[dev,eval,ray]'
	$(EVAL)/bin/python -m pip uninstall --yes torchvision torchaudio
	touch $@

# vLLM for the CPU asks for packages of which there are builds for CUDA alone. Those for sound and video are not
# needed; torchvision is, and gets a file that lets it be imported.
$(VLLM)/.installed: vllm/constraints.txt vllm/pyproject.toml pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --constraint vllm/constraints.txt --editable '.[demo]' --editable 'vllm[cpu,dev]'
	$(VLLM)/bin/python -m pip uninstall --yes torchaudio torchcodec
	cp vllm/tools/torchvision_for_cpu.* $(VLLM)/lib/python3.*/site-packages/
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(EVAL) $(DOCS) $(VLLM) .venv-5.* build dist demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
