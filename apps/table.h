// Results as rows: a Markdown table that is readable as it grows, or csv or json for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace kl::app {

enum class TableFormat { md, csv, json };
TableFormat table_format(const std::string& name);  // "md", "csv" or "json"

class Table {
 public:
  struct Column {
    std::string name;
    size_t width = 0;   // of the Markdown column; longer text makes it wider in its row
    bool left = false;  // text to the left; numbers stand to the right
    enum { everywhere, shown, data } where = everywhere;  // shown: md only; data: csv and json only
  };
  struct Cell {
    nlohmann::json value;  // what csv and json say
    std::string text;      // what the table shows
    template <class T>
    Cell(const T& v) : value(v), text(value.is_string() ? value.get<std::string>() : value.dump()) {}
    Cell(nlohmann::json v, std::string t) : value(std::move(v)), text(std::move(t)) {}
  };

  Table(TableFormat format, std::vector<Column> columns);
  void row(const std::vector<Cell>& cells);  // one for each column; printed at once
  void finish();

 private:
  TableFormat format_;
  std::vector<Column> columns_;
  bool empty_ = true;
};

}  // namespace kl::app
