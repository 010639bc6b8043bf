"""The sparse scaling law: its form, its fit."""
