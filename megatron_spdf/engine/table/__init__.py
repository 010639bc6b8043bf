"""Engines that a recipe may name, a file each: a row of rules, bytes and traffic, without an import
of the engine itself."""
