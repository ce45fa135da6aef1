"""The little world, the offline default: facts, the text it emits, the base model, the simulated teacher."""
