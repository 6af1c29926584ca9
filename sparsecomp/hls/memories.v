// Memories beside the processes that XLS makes: every one is a stream with valid and ready on both sides.

// Vectors of INPUTS values into words of WORD, in two banks; every trip gives the next row of the weights with the word
// that it reads: {row, word}. CHUNK values come at once, and then they are kept in registers. ORDERED, with a chunk of one:
// the place of every value comes from a memory of {word, lane}.
module vector_memory #(
    parameter INPUTS = 1, CHUNK = 1, WORD = 1, WORDS = 1, TRIPS = 1, BITS = 1, ORDERED = 0,
    parameter ROWS_FILE = "", PLACES_FILE = "", ORDER_FILE = ""
) (
    input wire clk, input wire rst,
    input wire [8 * CHUNK - 1:0] in_data, input wire in_vld, output wire in_rdy,
    output wire [BITS + 8 * WORD - 1:0] out_data, output wire out_vld, input wire out_rdy
);
    reg [BITS - 1:0] rows [0:TRIPS - 1];
    reg [15:0] places [0:TRIPS - 1];
    reg [31:0] order [0:INPUTS - 1];
    initial begin
        $readmemh(ROWS_FILE, rows);
        $readmemh(PLACES_FILE, places);
    end
    generate if (ORDERED) initial $readmemh(ORDER_FILE, order); endgenerate

    reg [1:0] full;
    reg writing, reading;
    reg [31:0] count, trip;
    reg [15:0] word, lane;
    wire [15:0] to_word = ORDERED ? order[count][31:16] : word;
    wire [15:0] to_lane = ORDERED ? order[count][15:0] : lane;
    assign in_rdy = !full[writing];
    wire taken = in_vld && in_rdy;
    wire complete = taken && count == INPUTS / CHUNK - 1;

    reg [BITS - 1:0] row1, row2;
    reg [15:0] place1;
    wire [8 * WORD - 1:0] word2;
    reg valid1, valid2, bank1, end1;
    wire step = !valid2 || out_rdy;
    wire started = step && full[reading];
    wire freed = step && valid1 && end1;
    assign out_data = {row2, word2};
    assign out_vld = valid2;

    genvar l;
    generate if (CHUNK == 1) for (l = 0; l < WORD; l = l + 1) begin : lanes
        // A memory for every lane: a synthesiser would take the enables of the lanes of one for an enable of every bit.
        reg [7:0] words [0:2 * WORDS - 1];
        reg [7:0] value;
        assign word2[8 * l +: 8] = value;
        always @(posedge clk) begin
            if (taken && to_lane == l) words[(writing ? WORDS : 0) + to_word] <= in_data;
            if (step) value <= words[(bank1 ? WORDS : 0) + place1];
        end
    end else begin : chunks
        wire [8 * WORD * WORDS - 1:0] vector [0:1];
        reg [8 * WORD - 1:0] value;
        assign word2 = value;
        always @(posedge clk) if (step) value <= vector[bank1][8 * WORD * place1 +: 8 * WORD];
        for (l = 0; l < WORD * WORDS; l = l + 1) begin : values
            if (l < INPUTS) begin : one
                reg [7:0] value0, value1;
                assign vector[0][8 * l +: 8] = value0;
                assign vector[1][8 * l +: 8] = value1;
                always @(posedge clk) if (taken && count == l / CHUNK) begin
                    if (writing) value1 <= in_data[8 * (l % CHUNK) +: 8];
                    else value0 <= in_data[8 * (l % CHUNK) +: 8];
                end
            end else begin : none
                assign vector[0][8 * l +: 8] = 0;
                assign vector[1][8 * l +: 8] = 0;
            end
        end
    end endgenerate

    always @(posedge clk) begin
        if (step) begin
            row1 <= rows[trip];
            place1 <= places[trip];
            row2 <= row1;
        end
        if (rst) begin
            full <= 0; writing <= 0; reading <= 0; count <= 0; trip <= 0; word <= 0; lane <= 0;
            valid1 <= 0; valid2 <= 0; bank1 <= 0; end1 <= 0;
        end else begin
            if (taken) begin
                count <= complete ? 0 : count + 1;
                lane <= (complete || lane == WORD - 1) ? 0 : lane + 1;
                word <= complete ? 0 : lane == WORD - 1 ? word + 1 : word;
            end
            if (complete) begin
                full[writing] <= 1;
                writing <= !writing;
            end
            if (step) begin
                valid1 <= started;
                valid2 <= valid1;
                bank1 <= reading;
                end1 <= started && trip == TRIPS - 1;
            end
            if (started) begin
                trip <= trip == TRIPS - 1 ? 0 : trip + 1;
                if (trip == TRIPS - 1) reading <= !reading;
            end
            if (freed) full[bank1] <= 0;
        end
    end
endmodule

// As vector_memory, with trips only for words that hold a value more than MOST away from ZERO: a queue of words and of their
// places. Values come out without ZERO, in 9 bits. Every one of GROUPS groups of rows goes through the queue once.
module queue_memory #(
    parameter INPUTS = 1, WORD = 1, WORDS = 1, GROUPS = 1, BITS = 1, ZERO = 0, MOST = 0, ROWS_FILE = ""
) (
    input wire clk, input wire rst,
    input wire [7:0] in_data, input wire in_vld, output wire in_rdy,
    output wire [BITS + 9 * WORD - 1:0] out_data, output wire out_vld, input wire out_rdy
);
    reg [BITS - 1:0] rows [0:GROUPS * WORDS - 1];
    initial $readmemh(ROWS_FILE, rows);

    reg [15:0] places [0:2 * WORDS - 1];
    reg [15:0] kept0, kept1;
    reg [1:0] full;
    reg writing, reading, any;
    reg [15:0] word, lane, slot, at;
    reg [31:0] base;
    assign in_rdy = !full[writing];
    wire taken = in_vld && in_rdy;
    wire signed [8:0] centred = $signed(in_data) - ZERO;
    wire far = centred > MOST || centred < -MOST;
    wire [8:0] stored = far ? centred : 9'd0;
    wire complete = word == WORDS - 1 && lane == INPUTS - 1 - WORD * (WORDS - 1);
    wire ends = complete || lane == WORD - 1;
    wire keeps = any || far;
    wire [15:0] slots = slot + keeps;
    wire [15:0] kept = reading ? kept1 : kept0;

    reg [BITS - 1:0] row2;
    reg [15:0] place1, slot1;
    reg [31:0] base1;
    wire [9 * WORD - 1:0] word2;
    reg valid1, valid2, bank1, last1, last2, end1;
    wire step = !valid2 || out_rdy;
    wire started = step && full[reading];
    wire last = at == kept - 1, done = last && base == (GROUPS - 1) * WORDS;
    generate if (BITS > 1) assign out_data = {row2[BITS - 1:1], last2, word2};
    else assign out_data = {last2, word2};
    endgenerate
    assign out_vld = valid2;

    genvar l;
    generate for (l = 0; l < WORD; l = l + 1) begin : lanes
        reg [8:0] words [0:2 * WORDS - 1];
        reg [8:0] value;
        assign word2[9 * l +: 9] = value;
        always @(posedge clk) begin
            if (taken && lane == l) words[(writing ? WORDS : 0) + slot] <= stored;
            if (step) value <= words[(bank1 ? WORDS : 0) + slot1];
        end
    end endgenerate

    always @(posedge clk) begin
        if (taken && ends) places[(writing ? WORDS : 0) + slot] <= word;
        if (step) begin
            place1 <= places[(reading ? WORDS : 0) + at];
            row2 <= rows[base1 + place1];
            slot1 <= at;
            base1 <= base;
            last1 <= last;
            last2 <= last1;
        end
        if (rst) begin
            full <= 0; writing <= 0; reading <= 0; any <= 0; word <= 0; lane <= 0; slot <= 0; at <= 0; base <= 0;
            valid1 <= 0; valid2 <= 0; bank1 <= 0; end1 <= 0;
        end else begin
            if (taken) begin
                any <= ends ? 0 : keeps;
                lane <= ends ? 0 : lane + 1;
                if (ends) begin
                    word <= complete ? 0 : word + 1;
                    slot <= complete ? 0 : slots;
                end
                if (complete) begin
                    // One trip, of zeros, where nothing is kept: sums must be given.
                    if (writing) kept1 <= slots == 0 ? 1 : slots;
                    else kept0 <= slots == 0 ? 1 : slots;
                    full[writing] <= 1;
                    writing <= !writing;
                end
            end
            if (step) begin
                valid1 <= started;
                valid2 <= valid1;
                bank1 <= reading;
                end1 <= started && done;
            end
            if (started) begin
                at <= last ? 0 : at + 1;
                if (last) base <= done ? 0 : base + WORDS;
                if (done) reading <= !reading;
            end
            if (step && valid1 && end1) full[bank1] <= 0;
        end
    end
endmodule

// The windows of a picture that streams by: all taps of one channel in a cycle, channel after channel. Memories delay the rows
// above and the columns to the left; each is read and written at the same place. Padding runs through as pixels of FILL.
module line_windows #(
    parameter HEIGHT = 1, WIDTH = 1, CHANNELS = 1, KERNEL_ROWS = 1, KERNEL_COLUMNS = 1, STRIDE_ROWS = 1,
    parameter STRIDE_COLUMNS = 1, DILATION_ROWS = 1, DILATION_COLUMNS = 1, TOP = 0, LEFT = 0, BOTTOM = 0, RIGHT = 0,
    parameter FILL = 0
) (
    input wire clk, input wire rst,
    input wire [7:0] in_data, input wire in_vld, output wire in_rdy,
    output reg [8 * KERNEL_ROWS * KERNEL_COLUMNS - 1:0] out_data, output reg out_vld, input wire out_rdy
);
    localparam ROWS = TOP + HEIGHT + BOTTOM, COLUMNS = LEFT + WIDTH + RIGHT;
    localparam ABOVE = (KERNEL_ROWS - 1) * DILATION_ROWS, BEFORE = (KERNEL_COLUMNS - 1) * DILATION_COLUMNS;
    localparam LINES = ABOVE > 0 ? ABOVE : 1, LINE = COLUMNS * CHANNELS;
    localparam BACK = KERNEL_COLUMNS > 1 ? KERNEL_COLUMNS - 1 : 1, COLUMN = DILATION_COLUMNS * CHANNELS;
    reg [8 * LINES - 1:0] lines [0:LINE - 1];
    reg [8 * KERNEL_ROWS * BACK - 1:0] columns [0:COLUMN - 1];
    reg [15:0] y, x, channel, skip_rows, skip_columns;
    reg [$clog2(LINE + 1) - 1:0] place, place1;
    reg [$clog2(COLUMN + 1) - 1:0] back, back1;
    reg [7:0] value;
    reg [8 * LINES - 1:0] read, written;
    reg valid1, gives1;
    wire real_pixel = y >= TOP && y < TOP + HEIGHT && x >= LEFT && x < LEFT + WIDTH;
    wire step = !out_vld || out_rdy;
    wire started = step && (!real_pixel || in_vld);
    assign in_rdy = step && real_pixel;
    wire pixel = channel == CHANNELS - 1, line = pixel && x == COLUMNS - 1, picture = line && y == ROWS - 1;
    wire [7:0] fill = FILL;

    // A line of one value is read before it was written.
    wire [8 * LINES + 7:0] now = {LINE == 1 ? written : read, value};
    wire [8 * KERNEL_ROWS * BACK - 1:0] past = columns[back1];
    wire [8 * KERNEL_ROWS * BACK - 1:0] next;
    wire [8 * KERNEL_ROWS * KERNEL_COLUMNS - 1:0] window;
    genvar i, j;
    generate for (i = 0; i < KERNEL_ROWS; i = i + 1) begin : taps
        wire [7:0] newest = now[8 * (KERNEL_ROWS - 1 - i) * DILATION_ROWS +: 8];
        assign next[8 * i * BACK +: 8] = newest;
        assign window[8 * ((i + 1) * KERNEL_COLUMNS - 1) +: 8] = newest;
        for (j = 1; j < KERNEL_COLUMNS; j = j + 1) begin : left
            assign window[8 * ((i + 1) * KERNEL_COLUMNS - 1 - j) +: 8] = past[8 * (i * BACK + j - 1) +: 8];
            if (j < BACK) assign next[8 * (i * BACK + j) +: 8] = past[8 * (i * BACK + j - 1) +: 8];
        end
    end endgenerate

    always @(posedge clk) begin
        if (started) begin
            read <= lines[place];
            value <= real_pixel ? in_data : fill;
            place1 <= place;
            back1 <= back;
            gives1 <= skip_rows == 0 && skip_columns == 0;
        end
        if (step && valid1) begin
            lines[place1] <= now[8 * LINES - 1:0];
            written <= now[8 * LINES - 1:0];
            columns[back1] <= next;
            out_data <= window;
        end
        if (rst) begin
            y <= 0; x <= 0; channel <= 0; place <= 0; back <= 0; valid1 <= 0; out_vld <= 0;
            skip_rows <= ABOVE; skip_columns <= BEFORE;
        end else begin
            if (step) begin
                valid1 <= started;
                out_vld <= valid1 && gives1;
            end
            if (started) begin
                channel <= pixel ? 0 : channel + 1;
                place <= line ? 0 : place + 1;
                back <= back == COLUMN - 1 ? 0 : back + 1;
                if (pixel) begin
                    x <= line ? 0 : x + 1;
                    skip_columns <= line ? BEFORE : skip_columns == 0 ? STRIDE_COLUMNS - 1 : skip_columns - 1;
                end
                if (line) begin
                    y <= picture ? 0 : y + 1;
                    skip_rows <= picture ? ABOVE : skip_rows == 0 ? STRIDE_ROWS - 1 : skip_rows - 1;
                end
            end
        end
    end
endmodule

// The rows of a memory in turn, again and again.
module cyclic_memory #(
    parameter DEPTH = 1, BITS = 1, FILE = ""
) (
    input wire clk, input wire rst,
    output reg [BITS - 1:0] out_data, output reg out_vld, input wire out_rdy
);
    reg [BITS - 1:0] rows [0:DEPTH - 1];
    initial $readmemh(FILE, rows);
    reg [31:0] at;
    wire step = !out_vld || out_rdy;
    always @(posedge clk) begin
        if (step) out_data <= rows[at];
        if (rst) begin
            at <= 0; out_vld <= 0;
        end else if (step) begin
            out_vld <= 1;
            at <= at == DEPTH - 1 ? 0 : at + 1;
        end
    end
endmodule

// Holds up to DEPTH values, so that what gives them need not wait for what takes them.
module stream_memory #(
    parameter DEPTH = 2, BITS = 8
) (
    input wire clk, input wire rst,
    input wire [BITS - 1:0] in_data, input wire in_vld, output wire in_rdy,
    output reg [BITS - 1:0] out_data, output reg out_vld, input wire out_rdy
);
    reg [BITS - 1:0] values [0:DEPTH - 1];
    reg [$clog2(DEPTH + 1) - 1:0] count, from, to;
    assign in_rdy = count != DEPTH;
    wire taken = in_vld && in_rdy;
    wire step = !out_vld || out_rdy;
    wire given = step && count != 0;
    always @(posedge clk) begin
        if (taken) values[to] <= in_data;
        if (given) out_data <= values[from];
        if (rst) begin
            count <= 0; from <= 0; to <= 0; out_vld <= 0;
        end else begin
            count <= count + taken - given;
            if (taken) to <= to == DEPTH - 1 ? 0 : to + 1;
            if (given) from <= from == DEPTH - 1 ? 0 : from + 1;
            if (step) out_vld <= given;
        end
    end
endmodule
