"""Many tasks on one base model: [`TaskBank`]."""

from .bank import TaskBank
from .output import BankOutput

__all__ = ["BankOutput", "TaskBank"]
