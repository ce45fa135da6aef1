"""The little world, the offline default: its facts, the text it emits, the base model, the simulated teacher."""
