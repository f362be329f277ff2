"""Models in memory: load, calibrate, adapt, train and measure them. It knows no recipe, plan or store."""
