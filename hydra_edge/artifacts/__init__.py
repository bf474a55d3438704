"""The inert artifacts that flow between the stages: `Graph`, `Engine`, `Prediction`, `Report`."""
