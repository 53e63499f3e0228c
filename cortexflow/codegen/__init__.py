"""Targets: one file each turns a legalised module into something that runs and that a person can read."""

from cortexflow.codegen.target import TARGETS, Executable, Target, find_target, interface_text, register_target

__all__ = ["TARGETS", "Executable", "Target", "find_target", "interface_text", "register_target"]
