// Tables: sorted by their headings; the leaderboard also paged, filtered and saved.
(function () {
  var PAGE_ROWS = 50;
  function make(tag, className, text) {
    var node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  // -> compare(a, b): numbers by size, words by the alphabet, what is missing last either way
  function order(values, down) {
    var sign = down ? -1 : 1;
    return function (a, b) {
      var x = values[a], y = values[b];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      if (typeof x === "number" && typeof y === "number") return sign * (x - y) || a - b;
      return sign * String(x).localeCompare(String(y), "en", {numeric: true}) || a - b;
    };
  }
  function range(n) { return Array.from({length: n}, function (_, i) { return i; }); }
  // headings become buttons; act(column, down) sorts
  function sortable(head, act) {
    Array.from(head.rows[0].cells).forEach(function (cell, column) {
      if (!cell.textContent.trim()) return;
      var button = make("button", "sort");
      button.type = "button";
      while (cell.firstChild) button.appendChild(cell.firstChild);
      cell.appendChild(button);
      cell.scope = "col";
      button.addEventListener("click", function () {
        var down = cell.getAttribute("aria-sort") === "ascending";
        Array.from(head.rows[0].cells).forEach(function (each) { each.removeAttribute("aria-sort"); });
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        act(column, down);
      });
    });
  }
  function valueOf(cell) {
    var given = cell.getAttribute("data-sort");
    var text = (given === null ? cell.textContent : given).trim();
    if (text === "" || text === "–") return null;
    var number = Number(text.replace(/,/g, "").replace(/^−/, "-").replace(/\s*%$/, ""));
    return isNaN(number) ? text : number;
  }
  document.querySelectorAll("table").forEach(function (table) {
    var body = table.tBodies[0];
    if (!table.tHead || !body || body.rows.length < 2 || table.closest(".board")) return;
    sortable(table.tHead, function (column, down) {
      var rows = Array.from(body.rows);
      var values = rows.map(function (row) { return row.cells[column] ? valueOf(row.cells[column]) : null; });
      var places = range(rows.length).sort(order(values, down));
      places.forEach(function (place) { body.appendChild(rows[place]); });
    });
  });

  // The same words as analysis.words has.
  function digits(value) {
    if (Math.abs(value) >= 1e3) return count(value);
    if (value !== 0 && Math.abs(value) < 1e-4) {
      return value.toExponential(3).replace(/\.?0+e/, "e").replace(/e([+-])(\d)$/, "e$10$2");
    }
    return String(Number(value.toPrecision(4)));
  }
  function count(value) { return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, ","); }
  function duration(s) {
    if (s < 60) return (s < 10 ? s.toFixed(1) : Math.round(s)) + " s";
    var w = Math.round(s);
    if (w < 3600) return Math.floor(w / 60) + " min " + w % 60 + " s";
    if (w < 48 * 3600) return Math.floor(w / 3600) + " h " + Math.floor(w % 3600 / 60) + " min";
    return Math.floor(w / 86400) + " d " + Math.floor(w % 86400 / 3600) + " h";
  }
  function show(value, kind, whole) {
    if (value === null) return "–";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (typeof value !== "number") return value;
    if (kind === "objective") return value.toFixed(4);
    if (kind === "epochs") return value.toFixed(1);
    if (kind === "duration") return duration(value);
    return whole ? String(value) : digits(value);
  }
  var symbols = {completed: "●", pruned: "✕", by_command: "□", unfinished: "◇"};
  function stateCell(cell, data, row, ending) {
    var won = data.winner !== null && row === 0;
    var state = make("span", "state " + (won ? "winner" : symbols[ending] ? ending : "failed"));
    var mark = make("i", "", won ? "★" : symbols[ending] || "▲");
    mark.setAttribute("aria-hidden", "true");
    state.append(mark, " " + (won ? data.winner : data.labels[ending]));
    cell.className = "text";
    cell.append(state);
    if (data.is_default.has(row)) cell.append(make("span", "badge", "default"));
    if (row in data.audited) {
      var badge = make("span", "badge", "audited");
      badge.title = "would have been stopped at " + count(data.audited[row]) + " images";
      cell.append(badge);
    }
  }

  function board(node, data) {
    var rows = data.cells[0].length, page = 0, sorted = range(rows), shown = sorted;
    var body = node.querySelector("tbody"), box = node.querySelector(".box");
    data.is_default = new Set(data.default);
    data.is_full = new Set(data.full);
    var states = data.columns.findIndex(function (column) { return column.kind === "state"; });
    function words(row) {
      var ending = data.cells[states][row];
      return [data.labels[ending], data.winner !== null && row === 0 ? data.winner : "",
              data.is_default.has(row) ? "default" : "", row in data.audited ? "audited" : ""].join(" ");
    }
    function render() {
      var pages = Math.max(1, Math.ceil(shown.length / PAGE_ROWS));
      page = Math.min(Math.max(page, 0), pages - 1);
      var first = page * PAGE_ROWS, part = shown.slice(first, first + PAGE_ROWS);
      body.replaceChildren.apply(body, part.map(function (row) {
        var line = document.createElement("tr");
        if (data.winner !== null && row === 0) line.className = "first";
        data.columns.forEach(function (column, c) {
          var cell = line.insertCell(), value = data.cells[c][row];
          if (column.kind === "state") return stateCell(cell, data, row, value);
          if (!data.is_full.has(row) && ["objective", "measure", "epochs"].indexOf(column.kind) >= 0) cell.className = "lower";
          cell.textContent = show(value, column.kind, column.integer);
        });
        return line;
      }));
      status.textContent = shown.length === 0 ? "No trial matches." :
        "Rows " + count(first + 1) + " to " + count(first + part.length) + " of " + count(shown.length) +
        (shown.length < rows ? " that match, of " + count(rows) : "");
      previous.disabled = page === 0;
      next.disabled = page >= pages - 1;
    }
    function apply() {
      var wanted = filter.value.trim().toLowerCase();
      shown = !wanted ? sorted : sorted.filter(function (row) {
        return /^\d+$/.test(wanted) ? String(data.cells[0][row]) === wanted :
          (words(row) + " " + data.cells[states][row]).toLowerCase().indexOf(wanted) >= 0;
      });
      page = 0;
      render();
    }
    var bar = make("div", "bar"), filter = make("input", "filter");
    filter.type = "search";
    filter.placeholder = "trial number or state";
    filter.setAttribute("aria-label", "Filter the leaderboard by trial number or state");
    var previous = make("button", "", "Previous"), next = make("button", "", "Next"), saver = make("button", "", "CSV");
    [previous, next, saver].forEach(function (button) { button.type = "button"; });
    saver.setAttribute("aria-label", "Save the leaderboard as CSV");
    var status = make("span", "soft");
    status.setAttribute("role", "status");
    filter.addEventListener("input", apply);
    function turn(by) { return function () { page += by; render(); box.scrollTop = 0; }; }
    previous.addEventListener("click", turn(-1));
    next.addEventListener("click", turn(1));
    saver.addEventListener("click", function () {  // the rows that match, in the order shown
      var header = data.columns.map(function (column) { return column.label; });
      var lines = shown.map(function (row) {
        return data.cells.map(function (cells, c) { return c === states ? words(row).trim().replace(/\s+/g, " ") : cells[row]; });
      });
      contrasweep.save(contrasweep.csv([header].concat(lines)), contrasweep.nameOf(node.id) + ".csv");
    });
    bar.append(filter, status, previous, next, saver);
    node.prepend(bar);
    sortable(node.querySelector("thead"), function (column, down) {
      sorted = range(rows).sort(order(data.cells[column], down));
      apply();
    });
    apply();
  }
  var boards = document.getElementById("boards");
  boards = boards ? JSON.parse(boards.textContent) : {};
  Object.keys(boards).forEach(function (id) { board(document.getElementById(id), boards[id]); });
  // a table that goes on to the right fades there, as scroll bars are hidden on many machines
  function fade(box) {
    box.classList.toggle("on", box.scrollWidth - box.clientWidth - box.scrollLeft > 1);
  }
  var sizes = new ResizeObserver(function (entries) {
    entries.forEach(function (entry) { fade(entry.target.closest(".box")); });
  });
  document.querySelectorAll(".box").forEach(function (box) {
    box.addEventListener("scroll", function () { fade(box); }, {passive: true});
    [box].concat(Array.from(box.children)).forEach(function (node) { sizes.observe(node); });
  });
})();
