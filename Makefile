# Everything runs in .venv, made from pyproject.toml and made again only when that changes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := runs/demo

.PHONY: install demo test browser lint clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vitrail needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@rm -rf $(DEMO)
	$(BIN)/vitrail train tiny --data digits --out $(DEMO)
	$(BIN)/vitrail evaluate $(DEMO)
	@echo
	@echo "Made $(DEMO): a Vision Transformer trained from nothing on 8x8 handwritten digits."
	@echo "  $(DEMO)/metrics.jsonl        how it learned, a line a pass"
	@echo "  $(DEMO)/confusion-test.png   what it takes for what"
	@echo "Next: $(BIN)/vitrail train quick --data cifar10 --out runs/cifar10   (10 minutes on two cores)"

test: $(STAMP) browser
	$(BIN)/pytest

# The tests of reports open them in a real browser.
browser:
	@if command -v chromium chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; \
	else echo "The tests of reports need chromium and chromedriver, and will fail without: install them (Debian:" \
		"apt-get install chromium chromium-driver)" >&2; fi

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv runs
