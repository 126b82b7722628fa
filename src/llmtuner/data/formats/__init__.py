"""Dataset formats: one file per shape of a row, the file name is the name of the format.

A format exports

- `to_conversation(row) -> Conversation`: the row has the format's own column names;
- `matches(row) -> bool` (optional): whether a row looks like this format, used when a data set
  names none;
- `COLUMNS` (optional): key of `columns` in dataset_info.json -> own column name;
- `TAGS` (optional): key of `tags` -> own key or role name inside a message.
"""

from llmtuner.extras.registry import Registry

FORMATS = Registry("dataset format", "llmtuner.data.formats", exports="to_conversation")
