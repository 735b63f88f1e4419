"""Run every benchmark and print its table."""

from benchmarks import spte_arrays

spte_arrays.main()
