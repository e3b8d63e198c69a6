"""Tests of README.md and docs/: blocks, recipes, generated pages, the site."""
