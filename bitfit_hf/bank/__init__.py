"""Many tasks on one base model: [`TaskBank`].

How a batch of several tasks runs:

1. [`TaskBank`] holds the tasks of the request in memory (`store`). A `Batch` says which examples are whose, and in
   which rows of the tables their biases lie (`batch`). It is in a context variable: no module is written to.
2. The `TaskModel` of each class in the batch runs on the whole batch (`task_models`). They share the base's modules,
   and what several call with the same arguments, the backbone, runs once (`intercept.run_once`).
3. In the base, a Linear starts its product from each example's `b_0 + δ`, one gather from the table of its bias
   (`layers`, `sites`). Other layers add each example's `δ` to their output. Where a bias is used inside a module, as
   in the attention of DeBERTa and XLNet, that module runs task by task (`intercept.run_task_by_task`).
4. The leaves of the head are each task's own, on the rows of its examples (`heads`).
5. [`BankOutput`] picks each example's answer out of the output of its task's model (`output`).

An [`Engine`](engine.py) may compute the backbone in one piece, from the same tables: ONNX Runtime does, see `onnx/`.

Which dimension is the batch, and who reads a bias, was seen when the bank was made (`trial`, `base`). `watch` notices
writes into the weights that the base shares with the model that was given. `predict` puts texts in front of a call
(`texts`, `padding`, `positions`), and labels behind it.
"""

from .bank import TaskBank
from .output import BankOutput
from .predict import EncodedText

__all__ = ["BankOutput", "EncodedText", "TaskBank"]
