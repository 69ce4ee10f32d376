.PHONY: install test lint format bench clean

install:
	python -m pip install -e ".[test,dev,bench]"

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' | xargs clang-format --dry-run --Werror
	mypy

format:
	ruff check --fix .
	ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' | xargs clang-format -i

bench:
	pytest benchmarks --benchmark-only

clean:
	rm -rf build dist *.egg-info fusedres/_C*.so
