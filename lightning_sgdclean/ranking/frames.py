# SPDX-License-Identifier: Apache-2.0
"""Tables as pandas DataFrames, where pandas is installed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def data_frame(table: Any, columns: Any = None) -> "pd.DataFrame":
    """What pandas makes of columns by name, or of rows.

    Raises:
        ImportError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas: pip install lightning-sgdclean[pandas]") from error
    return pd.DataFrame(table, columns=columns)
