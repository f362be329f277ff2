"""What commands show besides runs: data, models, presets, benchmarks, this machine."""
