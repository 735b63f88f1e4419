"""Run every benchmark and print its table."""

from benchmarks import explore, panels, spte_arrays

spte_arrays.main()
explore.main()
panels.main()
