"""Run every benchmark and print its table."""

from benchmarks import explore, panels, slots, spte_arrays, sweep

spte_arrays.main()
slots.main([16, 20])
sweep.main()
explore.main()
panels.main()
