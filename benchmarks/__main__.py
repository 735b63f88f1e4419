"""Run every benchmark and print its table."""

from benchmarks import explore, spte_arrays

spte_arrays.main()
explore.main()
