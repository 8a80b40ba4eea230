"""Commands and faces that are neither modelling nor training."""
