#include "table.h"

#include <algorithm>

#include "base/check.h"
#include "terminal.h"

namespace kl::app {

namespace {

std::string padded(const std::string& text, size_t width, bool left) {
  const std::string space(width > text.size() ? width - text.size() : 0, ' ');
  return left ? text + space : space + text;
}

std::string csv_field(const nlohmann::json& value) {
  std::string text = value.is_string() ? value.get<std::string>() : value.is_null() ? "" : value.dump();
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  for (size_t at = 0; (at = text.find('"', at)) != std::string::npos; at += 2) text.insert(at, 1, '"');
  return '"' + text + '"';
}

}  // namespace

TableFormat table_format(const std::string& name) {
  KL_CHECK(name == "md" || name == "csv" || name == "json", "format: expected md, csv or json, found ", name);
  return name == "md" ? TableFormat::md : name == "csv" ? TableFormat::csv : TableFormat::json;
}

Table::Table(TableFormat format, std::vector<Column> columns)
    : format_(format), columns_(std::move(columns)) {
  std::string line, rule;
  for (Column& c : columns_) {
    if (format_ == TableFormat::md && c.where != Column::data) {
      c.width = std::max(c.width, c.name.size());
      line += "| " + padded(c.name, c.width, c.left) + " ";
      rule += c.left ? "| " + std::string(c.width, '-') + " " : "| " + std::string(c.width - 1, '-') + ": ";
    } else if (format_ == TableFormat::csv && c.where != Column::shown) {
      line += (line.empty() ? "" : ",") + csv_field(c.name);
    }
  }
  if (format_ == TableFormat::md) print(line + "|\n" + rule + "|\n");
  if (format_ == TableFormat::csv) print(line + "\n");
}

void Table::row(const std::vector<Cell>& cells) {
  KL_CHECK(cells.size() == columns_.size(), "table: ", cells.size(), " cells for ", columns_.size(),
           " columns");
  std::string line;
  nlohmann::ordered_json object;
  for (size_t i = 0; i < cells.size(); ++i) {
    const Column& c = columns_[i];
    if (format_ == TableFormat::md && c.where != Column::data) {
      line += "| " + padded(cells[i].text, c.width, c.left) + " ";
    } else if (format_ == TableFormat::csv && c.where != Column::shown) {
      line += (i ? "," : "") + csv_field(cells[i].value);
    } else if (format_ == TableFormat::json && c.where != Column::shown) {
      object[c.name] = cells[i].value;
    }
  }
  switch (format_) {
    case TableFormat::md: print(line + "|\n"); break;
    case TableFormat::csv: print(line + "\n"); break;
    case TableFormat::json: print((empty_ ? "[\n  " : ",\n  ") + object.dump()); break;
  }
  empty_ = false;
}

void Table::finish() {
  if (format_ == TableFormat::json) print(empty_ ? "[]\n" : "\n]\n");
}

}  // namespace kl::app
