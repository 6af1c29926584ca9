// Memories beside the processes that XLS makes: every one is a stream with valid and ready on both sides.

// Vectors of INPUTS values into words of WORD, in two banks; every trip gives the next row of the weights with the word
// that it reads: {row, word}. ORDERED: the place of every value comes from a memory of {word, lane}.
module vector_memory #(
    parameter INPUTS = 1, WORD = 1, WORDS = 1, TRIPS = 1, BITS = 1, ORDERED = 0,
    parameter ROWS_FILE = "", PLACES_FILE = "", ORDER_FILE = ""
) (
    input wire clk, input wire rst,
    input wire [7:0] in_data, input wire in_vld, output wire in_rdy,
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
    wire complete = taken && count == INPUTS - 1;

    reg [BITS - 1:0] row1, row2;
    reg [15:0] place1;
    wire [8 * WORD - 1:0] word2;
    reg valid1, valid2, bank1, end1;
    wire step = !valid2 || out_rdy;
    wire started = step && full[reading];
    wire freed = step && valid1 && end1;
    assign out_data = {row2, word2};
    assign out_vld = valid2;

    // A memory for every lane: a synthesiser would take the enables of the lanes of one for an enable of every bit.
    genvar l;
    generate for (l = 0; l < WORD; l = l + 1) begin : lanes
        reg [7:0] words [0:2 * WORDS - 1];
        reg [7:0] value;
        assign word2[8 * l +: 8] = value;
        always @(posedge clk) begin
            if (taken && to_lane == l) words[(writing ? WORDS : 0) + to_word] <= in_data;
            if (step) value <= words[(bank1 ? WORDS : 0) + place1];
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

// Pictures in two banks, and the windows of every position, channels slowest.
module window_memory #(
    parameter HEIGHT = 1, WIDTH = 1, CHANNELS = 1, KERNEL_ROWS = 1, KERNEL_COLUMNS = 1, STRIDE_ROWS = 1,
    parameter STRIDE_COLUMNS = 1, DILATION_ROWS = 1, DILATION_COLUMNS = 1, TOP = 0, LEFT = 0, FILL = 0,
    parameter OUT_ROWS = 1, OUT_COLUMNS = 1
) (
    input wire clk, input wire rst,
    input wire [7:0] in_data, input wire in_vld, output wire in_rdy,
    output wire [7:0] out_data, output wire out_vld, input wire out_rdy
);
    localparam VALUES = HEIGHT * WIDTH * CHANNELS;
    reg [7:0] values [0:2 * VALUES - 1];
    reg [1:0] full;
    reg writing, reading;
    reg [31:0] count;
    integer row, column, channel, i, j;
    wire signed [31:0] y = row * STRIDE_ROWS + i * DILATION_ROWS - TOP;
    wire signed [31:0] z = column * STRIDE_COLUMNS + j * DILATION_COLUMNS - LEFT;
    wire in_picture = y >= 0 && y < HEIGHT && z >= 0 && z < WIDTH;
    wire [31:0] from = in_picture ? (y * WIDTH + z) * CHANNELS + channel : 0;
    assign in_rdy = !full[writing];
    wire taken = in_vld && in_rdy;
    wire complete = taken && count == VALUES - 1;

    reg [7:0] value;
    reg valid, padded;
    wire step = !valid || out_rdy;
    wire started = step && full[reading];
    wire tap = j == KERNEL_COLUMNS - 1, taps = tap && i == KERNEL_ROWS - 1;
    wire window = taps && channel == CHANNELS - 1;
    wire line = window && column == OUT_COLUMNS - 1, picture = line && row == OUT_ROWS - 1;
    wire [7:0] fill = FILL;
    assign out_data = padded ? fill : value;
    assign out_vld = valid;

    always @(posedge clk) begin
        if (taken) values[(writing ? VALUES : 0) + count] <= in_data;
        if (step) value <= values[(reading ? VALUES : 0) + from];
        if (rst) begin
            full <= 0; writing <= 0; reading <= 0; count <= 0; valid <= 0; padded <= 0;
            row <= 0; column <= 0; channel <= 0; i <= 0; j <= 0;
        end else begin
            if (taken) count <= complete ? 0 : count + 1;
            if (complete) begin
                full[writing] <= 1;
                writing <= !writing;
            end
            if (step) begin
                valid <= started;
                padded <= !in_picture;
            end
            if (started) begin
                j <= tap ? 0 : j + 1;
                if (tap) i <= taps ? 0 : i + 1;
                if (taps) channel <= window ? 0 : channel + 1;
                if (window) column <= line ? 0 : column + 1;
                if (line) row <= picture ? 0 : row + 1;
                if (picture) begin
                    full[reading] <= 0;
                    reading <= !reading;
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
