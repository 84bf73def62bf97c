"""One frozen ONNX graph for all tasks of a bank, and one task as an ONNX Runtime adapter.

- [`export_onnx`](graphs.py) traces a backbone whose layers take each example's `b_0 + δ` from outside (`layers`,
  `architectures`, `inputs`, `tracing`), and writes the graph, with int8 weights where they are asked for (`quantize`,
  `smoothing`), beside a description that is checked when it is read (`folder`).
- [`OnnxEngine`](session.py) runs it for a [`TaskBank`](../bank.py).
- [`export_onnx_adapter`](adapter.py) writes one task so that stock `onnxruntime` runs it without this library.

The packages of the extra `onnx` are imported when they are needed (`packages`).
"""
