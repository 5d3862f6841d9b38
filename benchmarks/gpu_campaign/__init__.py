"""Everything worth measuring on a GPU that is there for a quarter of an hour, in one command.

``python -m benchmarks gpu_campaign``: parts in an order of their own, each a process with a time limit, each leaving
its numbers the moment it has them. See ``plan.py`` for the parts and ``bare_machine.sh`` for a machine without a
package registry.
"""
